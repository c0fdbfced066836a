"""`mpq cache`: what is kept for the next time, and how to be rid of it."""

from __future__ import annotations

import click

from mpq.cli import options, terminal
from mpq.data.cache import cache_folder, cached_files, clear
from mpq.limits import current
from mpq.report.grid import counted


@click.command()
@click.option("--clear", "emptied", is_flag=True, help="Remove all of it.")
@options.as_json
def cache(emptied: bool, as_json: bool) -> None:
    """Show the decoded images and latency profiles that are kept, or remove them.

    They lie in $MPQ_CACHE or ~/.cache/mpq, and are made anew where they are missing. The files that
    were not used for longest go first when there are more than the limit (mpq --limit cache-mb=MB).

    \b
    mpq cache
    mpq cache --clear
    """
    found = cached_files()
    size = sum(path.stat().st_size for path in found)
    if emptied:
        clear()
    content = {"folder": str(cache_folder()), "files": len(found), "bytes": size}
    what = f"{counted(len(found), 'file')}, {size / 1e6:,.1f} MB"
    done = "removed" if emptied else f"of at most {current().cache_mb:,.0f} MB"
    terminal.result(
        as_json,
        {**content, "limit_mb": current().cache_mb, "cleared": emptied},
        f"{cache_folder()}: {what} {done}",
    )
