"""An experiment's results as one file of HTML that needs no network: pictures, tables, evidence, facts.

``page.py`` puts an experiment's page together, ``comparison.py`` that of several and ``fleet.py`` that of one on many
hosts; ``document.py`` is what all have around them. ``finding.py`` says in sentences what was found, ``figures.py``
draws it with plotly, ``hostmap.py`` draws the host, ``facts.py`` words the machine's facts. ``markup.py`` makes
elements, ``quantity.py`` numbers with units. ``style.css`` and ``page.js`` are written into every page.
"""
