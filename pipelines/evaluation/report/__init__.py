"""The report of an evaluation.

record.py     the figures, as `report.json` holds them          markdown.py   `report.md`: order and text around the tables
tables.py     the tables of `report.md`                         plots.py      its plots
legend.py     what the columns of the main table mean           samples_page.py   texts side by side, `samples.html`
"""
