"""What `data_condensation.py` compares learned images with."""
