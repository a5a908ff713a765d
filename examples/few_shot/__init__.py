"""What `maml.py` and `anil.py` share: the learners, the nets, the data and the report."""
