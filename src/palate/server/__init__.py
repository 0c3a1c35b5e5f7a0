"""The annotation web application over ``palate.feedback``: needs the extra ``palate[label]``."""
