"""What the results say of each claim: a table and a verdict, computed from the files, whatever they are.

A verdict is one of four: the claim *holds*, *fails*, is *undecided* where intervals overlap or nobody learned, or is
*not measured*. There is a file for each claim, and `worlds` with what they share.
"""

import pathlib

from evidence.claims.gain import gain
from evidence.claims.gaps import gaps
from evidence.claims.price import price
from evidence.claims.routes import routes
from evidence.claims.sparse import sparse
from evidence.claims.switches import switches
from evidence.claims.worlds import LONG, SIZES, WORLDS, Claim, evidence

__all__ = ["Claim", "claims", "evidence"]


def claims(results: pathlib.Path) -> list[Claim]:
    """All six."""
    worlds, sizes, long = (evidence(results, of) for of in (WORLDS, SIZES, LONG))
    return [
        gain([*worlds, *sizes]),
        price(worlds, long),
        gaps(worlds),
        switches(worlds),
        routes(worlds),
        sparse(worlds),
    ]
