"""The coordinator: rounds, training, evaluation and reports."""
