"""Speed measured against what people would use instead; no part of the installed package."""
