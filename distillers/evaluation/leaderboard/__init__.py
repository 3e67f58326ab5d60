"""The leaderboard: every method at one training budget, measured by the one protocol, as a table and a figure."""
