"""The leaderboard: every method with the same training budget and evaluation protocol, as a table and a figure."""
