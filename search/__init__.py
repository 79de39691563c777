"""The service around `bdense_core`: Optuna decides, Ray executes, PostgreSQL remembers."""
