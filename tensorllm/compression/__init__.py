"""Jobs over sites, in memory and from folder to folder; the report with every ratio by its name."""
