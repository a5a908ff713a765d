"""What `hyperparameters.py` compares hypergradients with."""
