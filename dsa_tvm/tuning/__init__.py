"""Auto-tuning jobs: search for decisions, measure them on this or on other machines, keep what holds."""
