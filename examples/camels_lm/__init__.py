"""The parts of ``camels.py``: documents, language model, weight model, the stages of the run, figures."""
