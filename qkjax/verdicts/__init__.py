"""Results, statistics, clauses and hypotheses: what a study decides, from files alone."""
