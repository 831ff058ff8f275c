"""Every figure that the README states comes from here."""
