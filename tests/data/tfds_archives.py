"""Tiny archives in the publishers' own forms, and a server that offers them."""

import gzip
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

Rating = tuple[int, int, float, int]

# User 1 rates 661, 1193 and 1 within one second, in an order that no sorting by item gives.
RATINGS: list[Rating] = [
    (1, 661, 3, 978300760),
    (1, 1193, 5, 978300760),
    (1, 1, 4, 978300760),
    (1, 50, 2, 978300700),
    (2, 1, 5, 978300000),
    (2, 661, 1, 978299999),
    (7, 1193, 4, 978300760),
]
MOVIES = [
    (1, "Toy Story (1995)", "Animation|Children's|Comedy"),
    (50, "Star Wars: Episode IV - A New Hope (1977)", "Action|Sci-Fi"),
    (661, "Misérables, Les (1995)", "Drama|Musical"),
    (900, "Never Rated (1950)", "Drama"),
    (1193, 'One "Flew" Over the Cuckoo\'s Nest (1975)', "Drama"),
]
_GENRES = [
    *["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"],
    *["Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"],
    *["Romance", "Sci-Fi", "Thriller", "War", "Western"],
]


def ratings_text(config: str, ratings: list[Rating] = RATINGS) -> bytes:
    """u.data, ratings.dat or ratings.csv."""
    if config == "100k":
        lines = [f"{u}\t{i}\t{r:g}\t{t}\n" for u, i, r, t in ratings]
    elif config == "1m":
        lines = [f"{u}::{i}::{r:g}::{t}\n" for u, i, r, t in ratings]
    else:
        lines = ["userId,movieId,rating,timestamp\n"]
        lines += [f"{u},{i},{float(r)},{t}\n" for u, i, r, t in ratings]
    return "".join(lines).encode()


def movies_text(config: str, movies: list[tuple[int, str, str]] = MOVIES) -> bytes:
    """u.item, movies.dat or movies.csv."""
    if config == "100k":
        lines = []
        for item, title, genres in movies:
            flags = ["1" if genre in genres.split("|") else "0" for genre in _GENRES]
            lines.append(
                "|".join([str(item), title, "01-Jan-1995", "", "http://x/", *flags]) + "\n"
            )
        return "".join(lines).encode("latin-1")
    if config == "1m":
        return "".join(f"{i}::{t}::{g}\n" for i, t, g in movies).encode("latin-1")
    lines = ["movieId,title,genres\r\n"]
    for item, title, genres in movies:
        quoted = '"' + title.replace('"', '""') + '"' if set(title) & set(',"') else title
        lines.append(f"{item},{quoted},{genres}\r\n")
    return "".join(lines).encode("utf-8")


def members(config: str) -> tuple[str, str]:
    """File names of ratings and films."""
    return {"100k": ("u.data", "u.item"), "1m": ("ratings.dat", "movies.dat")}.get(
        config, ("ratings.csv", "movies.csv")
    )


def write_movielens(
    path: Path,
    config: str,
    *,
    ratings: bytes | None = None,
    movies: bytes | None = None,
    folder: str | None = None,
) -> Path:
    """ml-CONFIG.zip as GroupLens packs it."""
    inside = f"ml-{config}" if folder is None else folder
    ratings_name, movies_name = members(config)
    ratings = ratings_text(config) if ratings is None else ratings
    movies = movies_text(config) if movies is None else movies
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{inside}/README", "read me")
        archive.writestr(
            f"{inside}/{movies_name}", movies_text(config) if movies is None else movies
        )
        archive.writestr(
            f"{inside}/{ratings_name}", ratings_text(config) if ratings is None else ratings
        )
    return path


def review(user: str, item: str, overall: float, time: int, **more: Any) -> dict[str, Any]:
    """One review with all the fields that the publisher gives."""
    return {
        "reviewerID": user,
        "asin": item,
        "reviewerName": 'A. "Name"',
        "helpful": [2, 3],
        "reviewText": "Nice, with a backslash \\ and a line\nbreak.",
        "overall": overall,
        "summary": "ok",
        "unixReviewTime": time,
        "reviewTime": "09 13, 2009",
        **more,
    }


# The publisher gives days: three reviews of one user on one day, in the file's order.
REVIEWS = [
    review("A2SUAM1J3GNN3B", "B000FTYALG", 5.0, 1252800000),
    review("A2SUAM1J3GNN3B", "7806397051", 2.0, 1252800000),
    review("A2SUAM1J3GNN3B", "B0009P4PZC", 4.0, 1252800000),
    review("A1YJEY40YUW4SE", "B000FTYALG", 1.0, 1391040000),
    review("A1YJEY40YUW4SE", "7806397051", 3.0, 1390000000),
]
PRODUCTS = [
    {
        "asin": "7806397051",
        "title": "WAWO 15 Color Professionl Makeup Eyeshadow &amp; Blush",
        "brand": "",
        "categories": [["Beauty", "Makeup", "Face"], ["Beauty", "Gifts"]],
        "related": {"also_viewed": ["B000FTYALG"]},
    },
    {"asin": "0000000000", "title": "never reviewed", "categories": [["Beauty"]]},
    {
        "asin": "B000FTYALG",
        "description": "It's 'asin': 'B0009P4PZC' in a text",
        "title": "  Rinse\tand   Shine ",
        "brand": "Acme",
        "categories": [["Beauty"]],
    },
]


def reviews_bytes(reviews: list[dict[str, Any]] = REVIEWS) -> bytes:
    """JSON lines, gzip."""
    return gzip.compress("".join(json.dumps(one) + "\n" for one in reviews).encode())


def products_bytes(products: list[dict[str, Any]] = PRODUCTS) -> bytes:
    """Python literals, one a line, gzip."""
    return gzip.compress("".join(repr(one) + "\n" for one in products).encode())


def many_ratings(count: int, rng: np.random.Generator) -> list[Rating]:
    """Ratings of few users in few seconds: nearly every time ties."""
    users = np.sort(rng.integers(1, 40, count))
    items = rng.integers(1, 300, count)
    times = 978300000 + rng.integers(0, 50, count)
    return [(int(u), int(i), 3, int(t)) for u, i, t in zip(users, items, times, strict=True)]


@dataclass
class Server:
    """Files by path, and how to answer wrongly."""

    files: dict[str, bytes]
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    status: int = 200
    head_status: int | None = None
    content_type: str = "application/octet-stream"
    cut_at: int | None = None
    """Closes the connection after so many bytes of the promised ones."""
    stall_at: int | None = None
    """Falls silent after so many bytes, until the test ends."""
    silent: bool = False
    """Takes the request and never answers."""
    drip_seconds: float = 0.0
    """Sends a block of 8 KB this often."""
    released: threading.Event = field(default_factory=threading.Event)
    broken_pipe: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    offer: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        offer = self.offer
        offer.requests.append((self.command, self.path))
        if offer.silent:
            offer.released.wait(60)
            return
        body = offer.files.get(self.path)
        status = offer.status if body is not None else 404
        if not with_body and offer.head_status is not None:
            status = offer.head_status
        body = body or b"not found"
        self.send_response(status)
        self.send_header("Content-Type", offer.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        try:
            self._send(body)
        except OSError:
            offer.broken_pipe.set()

    def _send(self, body: bytes) -> None:
        offer = self.offer
        if offer.cut_at is not None:
            self.wfile.write(body[: offer.cut_at])
            self.close_connection = True
        elif offer.stall_at is not None:
            self.wfile.write(body[: offer.stall_at])
            self.wfile.flush()
            offer.released.wait(60)
        elif offer.drip_seconds:
            for start in range(0, len(body), 8192):
                self.wfile.write(body[start : start + 8192])
                self.wfile.flush()
                if offer.released.wait(offer.drip_seconds):
                    return
        else:
            self.wfile.write(body)


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """Offers files on 127.0.0.1 until the block ends."""
    offer = Server({f"/pub/{name}": content for name, content in files.items()})
    handler = type("Handler", (_Handler,), {"offer": offer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        offer.url = f"http://127.0.0.1:{server.server_address[1]}/pub"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield offer
        finally:
            offer.released.set()
            server.shutdown()
            thread.join()


def everything_below(folder: Path) -> set[str]:
    """Files and folders, hidden ones too, relative to `folder`."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
