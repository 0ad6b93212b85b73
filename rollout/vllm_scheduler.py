"""vLLM's scheduler with prefix-cache keys that know what a block's contents depend on.

Stock keys are hashes of token ids. For us two more things decide what is in a KV block, so they go into its key:

    weight version   mixed into the first block of every request (keys are chained, so into all)
    request          mixed in from the first block that contains a soft position: its KV is of mixtures, its key would
                     be of the emitted ids

A block is thus only ever found by a request that would compute the same contents. When weights are swapped, every
request is re-keyed: waiting ones, which hold no KV, to the new version (still shared inside their group); running
ones, whose KV is of several versions from now on, to private keys, which nobody but the request itself can look up.
"""

from __future__ import annotations

import hashlib
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from rollout.vllm_soft import CONFIG_KEY, REQUEST_KEY, refuse_parameters


class _PlainView:
    """A request as the stock hasher sees it, with the unsalted keys that it chains on."""

    __slots__ = ("_request", "block_hashes")

    def __init__(self, request: Any, plain: list[bytes]) -> None:
        self._request = request
        self.block_hashes = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class BlockKeys:
    """The block hasher of one request: stock hashes, salted one by one."""

    def __init__(self, stock: Any, block_size: int, version: int, soft_from: int | None, request_id: str) -> None:
        self._stock = stock
        self._block_size = block_size
        self._soft_from = soft_from
        """First position whose KV is not a function of token ids; None for discrete requests."""
        self._request_salt = request_id.encode()
        self._version = version
        self._private = False
        self._plain: list[bytes] = []

    def __call__(self, request: Any) -> list[Any]:
        """Keys of the blocks that became full since the last call."""
        first = len(self._plain)
        if (first + 1) * self._block_size > request.num_tokens:
            return []  # asked for every token of every request: nearly always the answer
        self._plain += self._stock(_PlainView(request, self._plain))
        return [self._salted(key, index) for index, key in enumerate(self._plain[first:], start=first)]

    def _salted(self, key: bytes, index: int) -> Any:
        salt = self._version.to_bytes(8, "big", signed=True)
        soft = self._soft_from is not None and (index + 1) * self._block_size > self._soft_from
        if self._private or soft:
            salt += self._request_salt
        return hashlib.sha256(key + salt).digest()

    def rekey(self, request: Any, version: int, *, private: bool) -> None:
        """Give all full blocks of the request new keys under `version`."""
        self._version = version
        self._private = self._private or private
        request.block_hashes[:] = [self._salted(key, index) for index, key in enumerate(self._plain)]


class _VersionedKeys:
    """Mixin: salts the keys of every request and re-keys them when weights change."""

    policy_version: int | None = None

    def add_request(self, request: Any) -> None:
        if self.policy_version is None:
            settings = self.vllm_config.additional_config or {}  # type: ignore[attr-defined]
            self.policy_version = settings[CONFIG_KEY]["initial_version"]
        params = request.sampling_params
        values = (params.extra_args or {}).get(REQUEST_KEY) if params is not None else None
        if values is not None and values["soft"]:
            refuse_parameters(request.request_id, params)
        if values is None and params is not None and params.num_logprobs is not None:
            # Its columns would be those of our payload whenever it shares a step with one of our requests.
            raise ValueError(f"request {request.request_id}: logprobs of requests that SoftEngine did not make")
        if request._block_hasher is not None:
            block_size = self.hash_block_size  # type: ignore[attr-defined]
            soft_from = values["prompt_len"] if values is not None and values["soft"] else None
            stock = request._block_hasher
            keys = BlockKeys(stock, block_size, self.policy_version, soft_from, request.request_id)
            request._block_hasher = keys
            request.block_hashes[:] = []
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]

    def swap_version(self, version: int) -> None:
        """Re-key every request after the weights changed; cached blocks of the old version become unreachable."""
        self.policy_version = version
        for request in self.requests.values():  # type: ignore[attr-defined]
            keys = request._block_hasher
            if isinstance(keys, BlockKeys):
                keys.rekey(request, version, private=request.num_computed_tokens > 0)


class SoftScheduler(_VersionedKeys, Scheduler):  # type: ignore[misc]
    """For platforms without asynchronous scheduling (CPU)."""


class SoftAsyncScheduler(_VersionedKeys, AsyncScheduler):  # type: ignore[misc]
    """For asynchronous scheduling; vLLM turns it off unless the class derives from its own asynchronous one."""
