"""The demo: search, compare, map and judge pairs in a browser. `app.launch()` starts it, `q3vl-mini demo` calls that.

engine.py is the demo without a page: what a notebook or a test calls. Taught in notebooks/16.
"""
