"""The page of charts: what is stored, to look at in a browser.

What it does: reads the database as `reader` and answers HTTP. What it does not: write anything,
import anything of the ingester, or load anything from elsewhere.
"""
