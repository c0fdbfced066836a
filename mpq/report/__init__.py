"""Tables, plots and the HTML page of a run."""

from __future__ import annotations

from mpq.verb import callable_package

callable_package(__name__)
