"""BlockManager: who owns which page of the cache, and whose keys it still holds. Pure Python.

A page is owned by the requests that list it, or it is free. A full page whose tokens are all
computed is cached under a hash of its tokens and all before them:

    hash_i = blake2b(hash_{i-1}, token ids of page i),    hash_{-1} = blake2b(cache_salt)

256 bits wide, pages and salts under different personalisations, so that equal hashes mean equal
tokens at equal positions under one salt. Requests share cached pages and never write to them: what
a request computes begins behind them. A free page stays cached until it is handed out for something
else; those without a hash go first, then the least recently used, the end of a prefix before its
beginning.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.request import Request


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_SIZE)


class BlockManager:
    """Hands out pages 0..num_pages-1."""

    def __init__(self, num_pages: int, prefix_caching: bool = True):
        self.num_pages, self.prefix_caching = num_pages, prefix_caching
        self.prefix_queries = 0  # tokens of the requests that looked for cached pages
        self.prefix_hits = 0  # those that they found
        self._num_owners = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._pages: dict[bytes, int] = {}  # by the hash that they are cached under
        self._hashes: dict[int, bytes] = {}  # the same, by page

    @property
    def num_free(self) -> int:
        return len(self._free)

    def admit(self, request: Request, spare: int = 0) -> int | None:
        """Give a request without pages those of its cached prefix, and others for all its tokens.

        Returns the number of cached tokens, which leaves at least one to compute; None, and nothing
        changed, if fewer than `spare` pages would stay free.
        """
        reads = self.prefix_caching and not request.wants_prompt_logprobs
        cached = self._cached_prefix(request) if reads else []
        missing = pages_for(request.num_tokens) - len(cached)
        if missing + spare > self.num_free - sum(not self._num_owners[page] for page in cached):
            return None
        for page in cached:
            self._free.pop(page, None)
            self._num_owners[page] += 1
        request.page_ids += cached
        self._take(request, missing)
        if reads and not request.num_preemptions:
            self.prefix_queries += request.num_tokens
            self.prefix_hits += len(cached) * PAGE_SIZE
        return len(cached) * PAGE_SIZE

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give `request` pages for `num_tokens` tokens; False, and nothing changed, if too few."""
        missing = pages_for(num_tokens) - len(request.page_ids)
        if missing > self.num_free:
            return False
        self._take(request, missing)
        return True

    def cache(self, request: Request, start: int, end: int) -> None:
        """Tokens [start, end) of `request` are computed now: cache the pages that they filled."""
        if not self.prefix_caching:
            return
        for index in range(start // PAGE_SIZE, end // PAGE_SIZE):
            page, digest = request.page_ids[index], _page_hash(request, index)
            if digest not in self._pages:  # else another request was first, with a page of its own
                self._pages[digest], self._hashes[page] = page, digest

    def free(self, request: Request) -> None:
        """Take `request` off all its pages."""
        for page in reversed(request.page_ids):
            self._num_owners[page] -= 1
            if not self._num_owners[page]:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._hashes)
        request.page_ids.clear()

    def check(self, owners: Iterable[Request]) -> None:
        """Assert that pages, the requests that own any, and hashes agree."""
        listed = Counter(page for request in owners for page in request.page_ids)
        assert listed == {p: n for p, n in enumerate(self._num_owners) if n}, "wrong owners"
        assert self._free.keys() == set(range(self.num_pages)) - listed.keys(), "a page is lost"
        assert self._hashes == {page: digest for digest, page in self._pages.items()}, (
            "wrong hashes"
        )

    def _cached_prefix(self, request: Request) -> list[int]:
        """Cached pages of the request's longest prefix, short of its last token."""
        pages: list[int] = []
        for index in range((request.num_tokens - 1) // PAGE_SIZE):
            page = self._pages.get(_page_hash(request, index))
            if page is None:
                break
            pages.append(page)
        return pages

    def _take(self, request: Request, count: int) -> None:
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            if page in self._hashes:
                del self._pages[self._hashes.pop(page)]
            self._num_owners[page] = 1
            request.page_ids.append(page)


def _page_hash(request: Request, index: int) -> bytes:
    """Hash of the request's tokens up to the end of full page `index`; kept with the request."""
    hashes = request.page_hashes
    while len(hashes) <= index:
        start = len(hashes) * PAGE_SIZE
        tokens = array("q", request.token_ids(start, start + PAGE_SIZE)).tobytes()
        parent = hashes[-1] if hashes else _salt_hash(request.cache_salt)
        hashes.append(blake2b(parent + tokens, digest_size=32, person=b"page").digest())
    return hashes[index]


def _salt_hash(salt: str | None) -> bytes:
    data = b"" if salt is None else salt.encode(errors="surrogatepass")
    return blake2b(data, digest_size=32, person=b"salt").digest()
