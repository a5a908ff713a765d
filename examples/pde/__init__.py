"""Three equations, a spectral solver and a physics-informed net for them; ``pde_discovery.py`` is the example."""
