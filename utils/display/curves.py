"""Keeps a limited number of points of a curve, each with the running mean. The dashboard and the report show these
points."""

import bisect

Point = tuple[float, float, float]  # x, y, the running mean of y

MARKED_POINTS = 100  # shorter curves are drawn with markers, because a single point draws no line
SMOOTHED_FROM = 20  # curves with at least this number of points are also drawn smoothed
SPAN = 0.025  # the running mean covers this share of all points so far (at least 3 points)
VALIDATION = "validation"  # the name of curves of validation, which are dashed
NEVER_SMOOTHED = ("lr", "gpu_memory_gib", "codes_used", "skipped_updates")  # curves without noise


class Curve:
    """The points of one trace in the order of x. At most `limit` points are kept, evenly spaced; the newest point is
    always kept.

    Each point has the exponential moving average of y up to this point. The span of the average grows with the curve,
    so that long and short curves look equally smooth. The first 3 points have equal weights. With smooth=False the
    average is not shown.
    """

    def __init__(self, limit: int, smooth: bool = True) -> None:
        self.limit, self.smooth = limit, smooth
        self.points: list[Point] = []
        self.sent = 0  # the number of points that take() has returned
        self.stride, self.count = 1, 0  # every stride-th of the `count` points that were added is in `points`
        self.newest: Point | None = None  # the last point, or None if `points` contains the last point
        self.newest_sent = False

    @property
    def smoothed(self) -> bool:
        return self.smooth and len(self.points) >= SMOOTHED_FROM

    def add(self, x: float, y: float) -> bool:
        """Add a point. Existing points at x or later are dropped, because a resumed run repeats the steps of these
        points.

        Returns True if points that were taken are no longer valid, so that appending new points is not enough.
        """
        was_smoothed = self.smoothed
        dropped = self._drop_from(x)
        last = self.newest or (self.points[-1] if self.points else (x, y, y))
        self.count += 1
        weight = 1 / min(self.count, max(3, SPAN * self.count))
        self.newest, self.newest_sent = (x, y, last[2] + weight * (y - last[2])), False
        if (self.count - 1) % self.stride:
            return dropped
        self.points.append(self.newest)
        thinned = len(self.points) >= self.limit
        if thinned:
            self.stride *= 2
            self.points = self.points[::2]
        if self.points[-1] is self.newest:
            self.newest = None
        return dropped or thinned or len(self.points) == MARKED_POINTS or self.smoothed != was_smoothed

    def _drop_from(self, x: float) -> bool:
        """Drop the points at x and later. Returns True if there were such points."""
        last = self.newest or (self.points[-1] if self.points else None)
        if last is None or x > last[0]:
            return False
        n = bisect.bisect_left(self.points, x, key=lambda point: point[0])
        del self.points[n:]
        self.newest, self.count = None, n * self.stride
        return True

    def take(self, whole: bool, final: bool) -> tuple[list[float], list[float], list[float]]:
        """Return lists (xs, ys, means) of the points to send now, and mark these points as sent. whole: return all
        points, not only the new points.

        final: include the newest point even if thinning may remove this point later. Without `final` such a point is
        not sent, because many such points would accumulate on the server.
        """
        points = self.points[0 if whole else self.sent :]
        self.sent = len(self.points)
        if self.newest and (whole or (final and not self.newest_sent)):
            points.append(self.newest)
            self.newest_sent = True
        return [p[0] for p in points], [p[1] for p in points], [p[2] for p in points]
