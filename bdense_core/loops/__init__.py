"""The training loops behind the methods; these need torch."""
