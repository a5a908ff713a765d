"""What `hyper_representation.py` compares learned representations with."""
