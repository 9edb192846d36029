"""The cameras of a pipeline, which are added and removed while it runs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from upperson_camera.camera import Camera
from upperson_camera.settings import CameraSettings, Shared
from upperson_camera.stats import CameraStats, camera_stats
from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr, shortened

_STEP_S = 0.02


class Cameras:
    """Cameras by name; `add` and `forget` are for one thread at a time."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._by_name: dict[str, Camera] = {}
        self._ending: list[Camera] = []
        """Removed ones that still wait for the encoder."""
        self._additions: Counter[str] = Counter()
        """How often a camera was added, by name."""

    def __iter__(self) -> Iterator[Camera]:
        """Return those that were not removed."""
        return iter(list(self._by_name.values()))

    def __getitem__(self, name: object) -> Camera:
        """Return a camera; raise UsageError if there is none."""
        found = self._by_name.get(name) if isinstance(name, str) else None
        if found is None:
            text = f"no camera {safe_repr(name)}: add it first"
            raise UsageError(text, code="camera_unknown", camera=name)
        return found

    @property
    def all(self) -> list[Camera]:
        """Also the removed ones whose threads have not ended yet."""
        return [*self._by_name.values(), *self._ending]

    def add(self, camera: CameraSettings) -> Camera:
        """Add a camera; raise UsageError if the name is taken."""
        name = camera.name
        if name in self._by_name:
            text = f"there is a camera {shortened(name)} already"
            raise UsageError(text, code="camera_exists", camera=name)
        self._additions[name] += 1
        run_name = self._shared.run_name
        if self._additions[name] > 1:  # Its tracks begin to count again.
            run_name += f".{self._additions[name]}"
        shared = replace(self._shared, settings=camera.own, run_name=run_name)
        added = self._by_name[name] = Camera(camera, shared)
        return added

    def forget(self, camera: Camera) -> None:
        """Remove a camera that was ended, and the detectors that are not used any more."""
        if self._by_name.get(camera.name) is camera:  # Another thread may have removed it.
            self._ending.append(camera)  # First: it counts until its threads have ended.
            del self._by_name[camera.name]
        self._ending = [one for one in self._ending if one.is_alive]
        used = {id(one.detector) for one in self.all}
        for unused in set(self._shared.detectors) - used:
            del self._shared.detectors[unused]

    def stats_of(self, name: str) -> CameraStats:
        """Return what a camera did so far, also one that was removed or is not added yet."""
        if (found := self._by_name.get(name)) is not None:
            return found.stats()
        state = "removed" if name in self._additions else "waiting"
        return camera_stats(self._shared.counters.of(name), state, None)

    def stats(self) -> dict[str, CameraStats]:
        """Return what each did so far, those that were removed last."""
        names = [*self._by_name, *self._additions]
        return {name: self.stats_of(name) for name in dict.fromkeys(names)}


def end_cameras(
    cameras: Sequence[Camera],
    patience_s: float,
    longest_s: float,
    meanwhile: Callable[[float], None],
) -> None:
    """End cameras, and wait until they have ended, but not longer than ``longest_s``.

    After ``patience_s`` they drop the frames that wait, and what is stuck is abandoned.
    ``meanwhile`` is called with the beginning on `time.monotonic`.
    """
    began = time.monotonic()
    for camera in cameras:
        camera.stop(patience_s)
    while cameras and (passed_s := time.monotonic() - began) < longest_s:
        late = passed_s > patience_s
        cameras = [camera for camera in cameras if not camera.has_ended(began, late)]
        meanwhile(began)
        time.sleep(_STEP_S if cameras else 0)
