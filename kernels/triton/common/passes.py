"""Launches that every pass of a step makes (see `schedule.work_items`): described for the first, and kept."""

from collections.abc import Iterable
from typing import Any

from .launch import Launch


class PassLaunch:
    """A launch of several passes, which differ in their first token range and in their number of ranges.

    The launch has the first as its argument `first_range`, or as a field of `work`. In its grid a 0 stands for the
    number of ranges.
    """

    __slots__ = ("known", "launch")

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.known: Any = None

    def run(self, first_range: int, num_ranges: int) -> None:
        """Launch for num_ranges token ranges from first_range on."""
        x, y, z = self.launch.grid
        grid = x or num_ranges, y or num_ranges, z or num_ranges
        if self.known is None:
            arguments = self.launch.arguments
            if "work" in arguments:
                changed = {"work": arguments["work"]._replace(first_range=first_range)}
            else:
                changed = {"first_range": first_range}
            self.known = self.launch._replace(grid=grid, arguments=arguments | changed).run()
            return
        compiled, values = self.known
        names = list(self.launch.arguments)
        if "work" in names:
            place, field = names.index("work"), self.launch.arguments["work"]._fields.index("first_range")
            work = values[place]
            values[place] = *work[:field], first_range, *work[field + 1 :]
        else:
            values[names.index("first_range")] = first_range
        compiled.launch(grid, values, self.launch.constants.values())


def of_passes(launches: Iterable[Launch], axis: int) -> list[PassLaunch]:
    """The same launches for several passes, with their token ranges along axis 1 or 2 of the grid."""
    grids = [(launch, launch.grid[0], launch.grid[1] if axis == 2 else 0) for launch in launches]
    return [PassLaunch(launch._replace(grid=(x, y, 0 if axis == 2 else 1))) for launch, x, y in grids]


def run_pass(launches: Iterable[PassLaunch], first_range: int, num_ranges: int) -> None:
    """Run the launches of a pass of num_ranges token ranges from first_range on."""
    for launch in launches:
        launch.run(first_range, num_ranges)
