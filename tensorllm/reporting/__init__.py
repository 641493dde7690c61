"""What people look at: tables in the terminal, pages and plots."""
