"""Names and meanings that scripts written for other libraries expect."""
