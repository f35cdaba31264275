"""The processes of a run: how they meet, agree and make steps together; one alone is a team."""
