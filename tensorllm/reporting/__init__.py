"""Output for people: tables in the terminal, pages and plots."""
