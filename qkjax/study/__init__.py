"""The study as steps, and their execution: plan, sweep, states, run. It knows no verdict."""
