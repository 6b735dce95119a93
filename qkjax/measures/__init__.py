"""What is measured of queries, keys, values, logits and weights."""
