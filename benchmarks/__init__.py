"""Scripts that print one table each. `pods` also holds what `train.py --compile-only` knows of chips."""
