"""Who publishes what, and who receives it: filled at import time, read by everything else."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from .events import Action, Delivery, Event, Topic, check_actions, check_topic
from .exceptions import DuplicateReceiver, InvalidReceiver, InvalidTopic

Source = Any
"""A model class, a ``Topic`` or the name of a topic."""

F = TypeVar("F", bound=Callable[..., Any])

Start = Literal["now", "beginning"]
"""Where a durable consumer that is new begins to read the log."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What a model publishes of its changes (see ``notify_changes``)."""

    model: Any
    label: str
    topic: str
    fields: tuple[str, ...] = ()
    actions: frozenset[Action] | None = None
    delivery: Delivery | None = None
    using: str | None = None

    def tier(self, default: Delivery) -> Delivery:
        """The tier of its events, where ``default`` is that of the project.

        Only what is published in the transaction that writes the row can be durable.
        """
        if self.delivery is None and default == "durable" and self.using is not None:
            return "after_commit"
        return self.delivery or default


@dataclass(frozen=True, slots=True)
class Subscription:
    """One stream a receiver hears: a topic, and the one model on it if it asked for a model."""

    topic: str
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Receiver:
    """A registered receiver and its options (see :func:`receiver`)."""

    uid: str
    func: Callable[..., Any]
    sources: tuple[Source, ...]
    actions: frozenset[Action] | None = None
    every_node: bool = False
    concurrency: int = 1
    retries: int = 0
    timeout: float | None = None
    on_gap: bool = False
    durable: bool | None = None
    transactional: bool = False
    start: Start = "now"
    purpose: dict[str, Any] = field(default_factory=dict)
    """What ``forward`` and ``invalidates`` leave here for the system checks."""

    @property
    def is_async(self) -> bool:
        return is_coroutine_callable(self.func)

    @property
    def timed_out(self) -> str:
        """What the ``TimeoutError`` of an attempt says that took longer than ``timeout``."""
        return f"timed out after {self.timeout:g} s"


class Registry:
    """Publications by model label, and receivers in the order of registration."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.publications: dict[str, Publication] = {}
        self._receivers: dict[str, Receiver] = {}
        self._origins: dict[str, object] = {}
        self.revision = 0
        """Another number whenever other receivers are registered."""

    @property
    def receivers(self) -> list[Receiver]:
        return list(self._receivers.values())

    def add(self, receiver: Receiver, *, explicit_uid: bool, origin: object = None) -> None:
        """Register ``receiver``; registering the same function for the same source twice is once.

        Args:
            explicit_uid: whether its uid stands for itself, and must not be numbered.
            origin: the user's own function, where that of the receiver is made around it.

        Raises:
            DuplicateReceiver: its uid was given explicitly and is taken.
        """
        with self._lock:
            uid, number = receiver.uid, 1
            while (taken := self._receivers.get(uid)) is not None:
                if explicit_uid:
                    raise DuplicateReceiver(
                        f"dispatch_uid {uid!r} is taken by {describe(taken.func)}; give "
                        f"{describe(receiver.func)} one of its own."
                    )
                if self._origins[uid] is (origin or receiver.func):
                    return
                number += 1
                uid = f"{receiver.uid}#{number}"
            if uid != receiver.uid:
                receiver = replace(receiver, uid=uid)
            self._receivers[uid] = receiver
            self._origins[uid] = origin or receiver.func
            self.revision += 1

    def remove(self, func: Callable[..., Any]) -> bool:
        """Forget every registration of ``func``; tells whether there was one."""
        with self._lock:
            gone = [uid for uid, origin in self._origins.items() if origin is func]
            for uid in gone:
                del self._receivers[uid], self._origins[uid]
            self.revision += 1
            return bool(gone)

    def subscriptions(self, receiver: Receiver) -> tuple[Subscription, ...]:
        """The streams of a receiver, as the models are configured now."""
        return tuple(self.subscription(source) for source in receiver.sources)

    def subscription(self, source: Source) -> Subscription:
        if isinstance(source, Topic):
            return Subscription(source.name)
        if isinstance(source, str):
            return Subscription(source)
        label = model_label(source)
        publication = self.publications.get(label)
        return Subscription(label if publication is None else publication.topic, label)

    def durable_topics(self, receiver: Receiver, default: Delivery) -> tuple[str, ...]:
        """The topics that ``receiver`` reads from the event log and does not hear live.

        Args:
            default: tier of topics and models that name none.
        """
        sources = receiver.sources if receiver.durable is not False else ()
        if receiver.durable is None:
            sources = tuple(one for one in sources if self._tier(one, default) == "durable")
        return tuple(dict.fromkeys(self.subscription(source).topic for source in sources))

    def _tier(self, source: Source, default: Delivery) -> Delivery:
        if is_model(source):
            publication = self.publications.get(model_label(source))
            return default if publication is None else publication.tier(default)
        return (source.delivery if isinstance(source, Topic) else None) or default

    @contextmanager
    def isolated(self) -> Iterator[Registry]:
        """For tests: no receivers inside, and those of before again afterwards."""
        saved = self._receivers, self._origins
        self._receivers, self._origins = {}, {}
        self.revision += 1
        try:
            yield self
        finally:
            self._receivers, self._origins = saved
            self.revision += 1


registry = Registry()


def receiver(
    source: Source | Iterable[Source],
    *,
    actions: Iterable[str] | None = None,
    every_node: bool = False,
    concurrency: int = 1,
    retries: int = 0,
    timeout: float | None = None,
    dispatch_uid: str | None = None,
    on_gap: bool = False,
    durable: bool | None = None,
    transactional: bool = False,
    start: Start = "now",
) -> Callable[[F], F]:
    """Register a function to be called with each :class:`Event` of a source.

    Args:
        source: a model class, a topic (name or :class:`Topic`), or a list of them.
        actions: only these actions, such as ``["created", "updated"]``; None for all.
        every_node: True runs it in every listener; False in one of the deployment, the leader.
        concurrency: events handled at once (≥ 1). Events with the same key stay in order.
        retries: further attempts after a failure, with growing pauses (≥ 0). What a durable
            consumer has failed at is then kept as a dead letter.
        timeout: seconds after which one attempt of an async receiver is cancelled, and failed. A
            thread cannot be interrupted, so a sync receiver takes none.
        dispatch_uid: a name of its own; default: module, qualified name and source.
        on_gap: also call it with ``action="gap"`` when events may have been missed.
        durable: True makes it a durable consumer of its topics: it reads the event log, from
            where it stopped, however long it was away. False has it hear live events only. None:
            durable where the source is a ``Topic(..., delivery="durable")``, a model that
            publishes so, or a topic of unnamed delivery under ``PGNOTIFY_DELIVERY = "durable"``.
        transactional: (durable) each call is part of the transaction in which the consumer moves
            on, so what it does in that database happens exactly once. Sync, ``concurrency=1``.
        start: (durable) where it begins when it is new: ``"now"`` or ``"beginning"`` of the log.

    Raises:
        InvalidReceiver: the function cannot be called with one event, or an option cannot work.
        InvalidTopic, InvalidAction: the source or an action is not valid.
        DuplicateReceiver: the ``dispatch_uid`` is taken.
    """
    if inspect.isroutine(source):
        raise InvalidTopic(
            f"@receiver above {describe(source)} has no source: write @receiver(source), with a "
            f"model or a topic."
        )
    sources = check_sources(source)
    chosen = check_actions(actions)
    _check_count("concurrency", concurrency, 1)
    _check_count("retries", retries, 0)
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0
    ):
        raise InvalidReceiver(f"timeout= takes a number of seconds above 0; got {timeout!r}.")
    if dispatch_uid is not None and (not isinstance(dispatch_uid, str) or not dispatch_uid):
        raise InvalidReceiver(f"dispatch_uid= takes a non-empty string; got {dispatch_uid!r}.")

    wants_log = _check_durable(durable, transactional, start, every_node, concurrency)

    def register(func: F) -> F:
        check_signature(func)
        if transactional and is_coroutine_callable(func):
            raise InvalidReceiver(
                f"{describe(func)} is async, and Django's transactions are sync; make it a plain "
                f"def or leave out transactional=True."
            )
        if timeout is not None and not is_coroutine_callable(func):
            raise InvalidReceiver(
                f"{describe(func)} is sync, and a thread cannot be interrupted; make it async def "
                f"or leave out timeout=."
            )
        names = ",".join(source_name(one) for one in sources)
        registry.add(
            Receiver(
                uid=dispatch_uid or f"{describe(func)}:{names}",
                func=func,
                sources=sources,
                actions=chosen,
                every_node=bool(every_node),
                concurrency=concurrency,
                retries=retries,
                timeout=timeout,
                on_gap=bool(on_gap) or (chosen is not None and "gap" in chosen),
                durable=wants_log,
                transactional=bool(transactional),
                start=start,
            ),
            explicit_uid=dispatch_uid is not None,
        )
        return func

    return register


def check_sources(source: Source | Iterable[Source]) -> tuple[Source, ...]:
    """``source`` as a tuple of models and topics; raises InvalidTopic for anything else."""
    several = isinstance(source, (list, tuple, set, frozenset))
    sources = tuple(source) if several else (source,)
    if not sources:
        raise InvalidTopic("The list of sources is empty: name a model or a topic.")
    for one in sources:
        if not isinstance(one, Topic) and not is_model(one):
            check_topic(one)
    return sources


def is_model(source: object) -> bool:
    """Whether ``source`` is a Django model class (recognised by its ``_meta``)."""
    return isinstance(source, type) and hasattr(getattr(source, "_meta", None), "label_lower")


def model_label(model: Any) -> str:
    """Lower-case label of the model whose table it is: a proxy shares that of its concrete one."""
    label: str = (model._meta.concrete_model or model)._meta.label_lower
    return label


def source_name(source: Source) -> str:
    return model_label(source) if is_model(source) else str(source)


def describe(func: Callable[..., Any]) -> str:
    """``module.qualified_name`` of a callable, as messages and default uids show it."""
    name = getattr(func, "__qualname__", None) or type(func).__qualname__
    return f"{getattr(func, '__module__', '?')}.{name}"


def is_coroutine_callable(func: Callable[..., Any]) -> bool:
    call = getattr(func, "__call__", None)  # noqa: B004 - an object's async __call__ counts too
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(call)


def check_signature(func: object) -> None:
    """Raise InvalidReceiver unless ``func`` can be called with one positional argument."""
    if not callable(func):
        raise InvalidReceiver(f"A receiver is a function of one event; got {func!r}.")
    name = describe(func)
    if inspect.isclass(func):
        raise InvalidReceiver(f"{name} is a class; a receiver is a function of one event.")
    if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        raise InvalidReceiver(f"{name} is a generator and would never run; use def or async def.")
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(object())
    except TypeError as exc:
        raise InvalidReceiver(
            f"{name}{signature} cannot be called with one event ({exc}); "
            f"write it as def {getattr(func, '__name__', 'receiver')}(event)."
        ) from None


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidReceiver(f"{name}= takes a whole number of at least {least}; got {value!r}.")


def _check_durable(
    durable: bool | None, transactional: bool, start: object, every_node: bool, concurrency: int
) -> bool | None:
    """Refuse options that contradict each other; returns ``durable`` as they settle it."""
    if start not in get_args(Start):
        raise InvalidReceiver(f"start= takes 'now' or 'beginning'; got {start!r}.")
    if every_node and (durable or transactional):
        raise InvalidReceiver(
            "every_node=True hears live events in every listener; a durable consumer gets each "
            "event once. Leave out one of them."
        )
    if transactional and durable is False:
        raise InvalidReceiver("transactional=True is for durable consumers; durable is False.")
    if transactional and concurrency != 1:
        raise InvalidReceiver(
            f"transactional=True handles one event after the other; concurrency is {concurrency}."
        )
    return False if every_node else (durable or transactional or durable)


def accepts(receiver: Receiver, event: Event) -> bool:
    """Whether a receiver's ``actions=`` lets an event through."""
    return receiver.actions is None or event.action in receiver.actions
