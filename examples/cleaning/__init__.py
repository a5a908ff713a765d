"""What `data_cleaning.py` compares with, in `baselines`, and weights as a function of an example, in `weights`."""
