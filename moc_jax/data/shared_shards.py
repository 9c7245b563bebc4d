"""The shards of a cache whose hosts share nothing but the bucket that it lies in."""

from collections.abc import Mapping
from pathlib import Path

from moc_jax.data.cache import damage
from moc_jax.data.copies import BucketFile, fetched, is_sent, pull, send
from moc_jax.data.manifest import ENCODED, ShardEntry


class SharedShards:
    """What of a cache's shards lies in the bucket that it is a copy of; of a cache on a disk, nothing."""

    def __init__(self, root: Path, *, check: bool):
        """`check`: compare shards with their digests."""
        self._root, self._check = root, check
        self._held: Mapping[Path, BucketFile] = {}

    def look(self) -> None:
        """Learns what other hosts have sent."""
        self._held = pull(self._root / ENCODED, lambda path: path.suffix == ".json")

    def problem(self, shard: Path, entry: ShardEntry) -> str:
        """What is wrong with a shard, empty if nothing is; what lies here alone is then sent."""
        if shard.with_suffix(".json") not in self._held:
            problem = damage(shard, entry, read=self._check)
            if not (problem or is_sent(shard.with_suffix(".json"))):  # another process here may just have sent it
                self.send(shard)
            return problem
        if not entry.file:
            return ""
        found = self._held[shard].object.size if shard in self._held else None
        if found != entry.size:
            return "is missing" if found is None else f"has {found} bytes instead of {entry.size}"
        if self._check:
            fetched(shard, entry.size)
        return damage(shard, entry, read=True) if self._check else ""

    def send(self, shard: Path) -> None:
        """The shard first, since its record says that it is there."""
        if shard.exists():
            send(shard, loose=True)
        send(shard.with_suffix(".json"))
