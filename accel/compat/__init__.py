"""Names and meanings that scripts written for other libraries expect, in terms of our settings.

Everything here stands on the core, and the core knows nothing of it. What cannot be honoured is refused by name.
"""
