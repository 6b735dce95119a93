"""Pages, figures and tables of a study or of runs, from files alone."""
