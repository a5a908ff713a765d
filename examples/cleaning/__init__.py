"""What `data_cleaning.py` compares with, and the weights it learns: `baselines` needs no outer level, `weights` does."""
