"""manifest.json of a prepared set: what it says, how it is read and checked."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from jaxrec.data._store import sha256_file
from jaxrec.data.paths import MANIFEST
from jaxrec.errors import UserError

SCHEMA_VERSION = 1
FORMAT = "jaxrec prepared data set"
TimeUnit = Literal["s", "ms", "us", "ns"]
TICKS_PER_SECOND: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def jaxrec_version() -> str:
    """Version of the package that writes."""
    import jaxrec

    return jaxrec.__version__


def ids_digest(ids: pa.Array) -> str:
    """SHA-256 of the ids themselves, whatever file format holds them."""
    digest = hashlib.sha256(str(ids.type).encode())
    if pa.types.is_integer(ids.type):
        digest.update(np.ascontiguousarray(ids.to_numpy(), "<i8").tobytes())
    else:
        for start in range(0, len(ids), 1 << 16):
            for text in ids.slice(start, 1 << 16).to_pylist():
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file in a folder."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
    }


def content_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a model depends on: events, ids and item vectors, not titles."""
    parts = [
        f"{file} {record['sha256']}"
        for file, record in sorted(manifest["files"].items())
        if file.endswith(".npy")
    ]
    parts += [f"{kind} {manifest['ids'][kind]['sha256']}" for kind in ("user", "item")]
    parts.append(f"time_unit {manifest['time_unit']}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but its own, in an order of their own."""
    entries = {key: value for key, value in manifest.items() if key != "manifest_hash"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the set at `path`.

    Raises:
        UserError: where it cannot be read, is incomplete, altered or of a newer jaxrec.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); import the set again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file}: not the manifest of a prepared data set")
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema version {version} is newer than this jaxrec's {SCHEMA_VERSION} "
            f"(written by jaxrec {manifest.get('jaxrec_version')}); upgrade jaxrec, or import again"
        )
    try:
        complete = (
            all(isinstance(manifest["counts"][key], int) for key in ("users", "items", "events"))
            and isinstance(manifest["name"], str)
            and isinstance(manifest["hash"], str)
            and manifest["time_unit"] in (None, *TICKS_PER_SECOND)
            and isinstance(manifest["has_ratings"], bool)
            and all(
                isinstance(record["bytes"], int) and isinstance(record["sha256"], str)
                for record in manifest["files"].values()
            )
        )
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{file}: entries are missing or of the wrong type; import the set again")
    # Sets that were made before it was written have none.
    if manifest.get("manifest_hash", manifest_hash(manifest)) != manifest_hash(manifest):
        raise UserError(
            f"{file}: altered, its entries are not what was written; import the set again"
        )
    return manifest


def check_file(file: Path, record: Mapping[str, Any], *, verify: bool) -> None:
    """Raises UserError where a file is missing, of another size, or (verify) of another hash."""
    try:
        size = file.stat().st_size
    except OSError:
        raise UserError(f"{file}: the file is missing; import the set again") from None
    if not file.is_file():
        raise UserError(f"{file}: not a file; import the set again")
    if size != record["bytes"]:
        what = "truncated" if size < record["bytes"] else "altered"
        raise UserError(
            f"{file}: {what}, {size:,} bytes where the manifest says {record['bytes']:,}; "
            "import the set again"
        )
    if verify and sha256_file(file) != record["sha256"]:
        raise UserError(f"{file}: altered, its hash is not the manifest's; import the set again")
