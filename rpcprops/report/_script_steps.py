"""What each kind of step is in a stand-alone script: plain torch, and the functions that it needs.

Another kind of step is one more case of :meth:`StepWriter.body`, and what ranks call for it one
more entry of :data:`_FUNCTIONS`. In both, ``«call, »`` stands where a call carries its name (so
that calls with equal arguments differ, as in a rank of ours), and ``«ran»`` where runs are counted.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

from rpcprops.programs import (
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Leaf,
    Local,
    Module,
    Nest,
    Optimize,
    Own,
    Pause,
    Refused,
    Remote,
    Share,
    Through,
    Wait,
)

_DIST_AUTOGRAD = "import torch.distributed.autograd as dist_autograd"

#: What ranks call on each other, or use: other functions that it needs, imports, and its code.
_FUNCTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "tensor": (
        (),
        (),
        """
        def tensor(*numbers):
            return torch.tensor(numbers, dtype=torch.float64)
        """,
    ),
    "add": (
        (),
        (),
        """
        def add(«call, »left, right):
            «ran»
            return left + right
        """,
    ),
    "add_fetched": (
        (),
        (),
        """
        def add_fetched(«call, »left, rref):
            «ran»
            return left + rref.to_here()
        """,
    ),
    "script_add": (
        (),
        (),
        """
        @torch.jit.script
        def script_add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right
        """,
    ),
    "script_raise": (
        (),
        (),
        """
        @torch.jit.script
        def script_raise(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            if left.numel() >= 0:
                raise RuntimeError("raised on purpose")
            return left + right
        """,
    ),
    "raise_on_purpose": (
        (),
        (),
        """
        def raise_on_purpose(«call, »left, right):
            «ran»
            raise RuntimeError("raised on purpose")
        """,
    ),
    "keep": (
        (),
        (),
        """
        def keep(«call, »name, rref):
            «ran»
            handles[name] = rref
        """,
    ),
    "keep_from_list": (
        (),
        (),
        """
        def keep_from_list(«call, »name, rrefs):
            «ran»
            (handles[name],) = rrefs
        """,
    ),
    "keep_from_dict": (
        (),
        (),
        """
        def keep_from_dict(«call, »name, rrefs):
            «ran»
            handles[name] = rrefs["rref"]
        """,
    ),
    "count": (
        (),
        (),
        """
        counter = itertools.count(1)


        def count(«call»):
            «ran»
            return next(counter)
        """,
    ),
    "chained_add": (
        ("add",),
        (),
        """
        @rpc.functions.async_execution
        def chained_add(«call, »then, left, right):
            «ran»
            return rpc.rpc_async(then, add, args=(«call + "/then", »left, right))
        """,
    ),
    "remote_add": (
        ("add",),
        (),
        """
        def remote_add(«call, »to, left, right):
            «ran»
            return rpc.remote(to, add, args=(«call + "/nested", »left, right))
        """,
    ),
    "remote_builtin_add": (
        (),
        (),
        """
        def remote_builtin_add(«call, »to, left, right):
            «ran»
            return rpc.remote(to, torch.add, args=(left, right))
        """,
    ),
    "remote_script_add": (
        ("script_add",),
        (),
        """
        def remote_script_add(«call, »to, left, right):
            «ran»
            return rpc.remote(to, script_add, args=(left, right))
        """,
    ),
    "bump": (
        (),
        (),
        """
        @torch.jit.script
        def bump(rref: rpc.RRef[torch.Tensor]) -> torch.Tensor:
            value: torch.Tensor = rref.local_value()
            return value.add_(1.0)
        """,
    ),
    "hop": (
        (),
        (),
        """
        def hop(«call, »factor, x):
            «ran»
            return factor * x + 1.0
        """,
    ),
    "breaking_hop": (
        (),
        (),
        """
        class BreaksInBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise RuntimeError("raised on purpose")


        def breaking_hop(«call, »factor, x):
            «ran»
            return BreaksInBackward.apply(factor * x + 1.0)
        """,
    ),
    "hop_on": (
        (),
        (),
        '''
        def hop_on(«call, »here, factor, rest, x):
            """One hop, then the rest of the path from there."""
            y = here(«call, »factor, x)
            if not rest:
                return y
            (to, *there), *rest = rest
            return rpc.rpc_sync(to, hop_on, args=(«call, »*there, rest, y))
        ''',
    ),
    "Left": (
        (),
        (),
        '''
        class Left(Exception):
            """Raised inside a context, to leave it by an exception."""
        ''',
    ),
    "make_parameter": (
        (),
        (),
        """
        def make_parameter(«call, »value):
            «ran»
            return value.clone().requires_grad_()
        """,
    ),
    "PlainSGD": (
        (),
        ("from torch.distributed.optim import DistributedOptimizer",),
        '''
        class PlainSGD(torch.optim.SGD):
            """SGD under another name, so that torch does not compile it by TorchScript."""
        ''',
    ),
    "Affine": (
        (),
        ("from torch.distributed.nn.api.remote_module import RemoteModule",),
        """
        class Affine(torch.nn.Module):
            def forward(self, x):
                return 2.0 * x + 1.0
        """,
    ),
}


@dataclass
class StepWriter:
    """Writes the bodies of steps, and remembers what they need.

    Attributes:
        names: the ranks' names.
        labels: whether calls carry their names.
        counts: whether each rank counts the calls that ran in it.
        functions: names of what was needed so far.
        imports: lines of imports that were needed so far.
    """

    names: tuple[str, ...]
    labels: bool = False
    counts: bool = False
    functions: dict[str, None] = field(default_factory=dict)
    imports: dict[str, None] = field(default_factory=dict)

    def code_of_functions(self) -> list[str]:
        """What ranks call on each other, in the order in which it was needed."""
        return [self._filled(textwrap.dedent(_FUNCTIONS[name][2])) for name in self.functions]

    def body(self, index: int, leaf: Leaf) -> list[str]:
        """The lines of one step."""
        call = f'"step{index}"'
        return self._filled("\n".join(self._lines(leaf)), call).splitlines()

    def _filled(self, text: str, call: str = "call") -> str:
        """`text` with or without the names of calls and the counting of runs."""

        def fill(found: re.Match[str]) -> str:
            inside = found.group(1)
            if not self.labels:
                return ""
            return inside.replace("call", call, 1)

        ran = r"\1ran[call] += 1\n" if self.counts else ""
        text = re.sub(r"( *)«ran»\n", ran, text)
        return re.sub("«([^»]*)»", fill, text).strip("\n")

    def need(self, name: str) -> str:
        """Take a function along; its name."""
        others, imports, _ = _FUNCTIONS[name]
        for other in others:
            self.need(other)
        self.imports.update(dict.fromkeys(imports))
        self.functions[name] = None
        return name

    def _numbers(self, value: Any) -> str:
        self.need("tensor")
        return f"tensor({', '.join(map(_number, value))})"

    def _function(self, leaf: Remote | Call) -> tuple[str, str]:
        """The function that a call runs, and its arguments."""
        python = leaf.flavour == "python"
        left = self._numbers(leaf.left)
        if isinstance(leaf.right, str):
            right, name = f"handles[{_quoted(leaf.right)}]", "add_fetched"
        else:
            right, name = self._numbers(leaf.right), "add"
        if leaf.raises:
            name = "raise_on_purpose" if python else "script_raise"
        elif leaf.flavour == "script":
            name = "script_add"
        if leaf.flavour == "builtin":
            return "torch.add", f"({left}, {right})"
        return self.need(name), f"({'«call, »' if python else ''}{left}, {right})"

    def _lines(self, leaf: Leaf) -> list[str]:
        match leaf:
            case Remote():
                function, args = self._function(leaf)
                made = f"rpc.remote({self._to(leaf.to)}, {function}, args={args}{_timed(leaf)})"
                return [f"handles[{_quoted(leaf.out)}] = {made}"]
            case Own():
                return [f"handles[{_quoted(leaf.out)}] = rpc.RRef({self._numbers(leaf.value)})"]
            case Share():
                rref = f"handles[{_quoted(leaf.handle)}]"
                keep = {"": "keep", "list": "keep_from_list", "dict": "keep_from_dict"}[leaf.inside]
                sent = {"": rref, "list": f"[{rref}]", "dict": f'{{"rref": {rref}}}'}[leaf.inside]
                args = f"(«call, »{_quoted(leaf.out)}, {sent})"
                to = self._to(leaf.to)
                return [f"rpc.rpc_sync({to}, {self.need(keep)}, args={args}{_timed(leaf)})"]
            case Fetch():
                timeout = _timed(leaf).removeprefix(", ")
                return [f"return handles[{_quoted(leaf.handle)}].to_here({timeout}).tolist()"]
            case Local():
                return [f"return handles[{_quoted(leaf.handle)}].local_value().tolist()"]
            case Call():
                return self._call(leaf)
            case Wait():
                return [f"return futures.pop({_quoted(leaf.future)}).wait().tolist()"]
            case Count():
                args = ", args=(«call,»)" if self.labels else ""
                return [f"return rpc.rpc_sync({self._to(leaf.to)}, {self.need('count')}{args})"]
            case Chain():
                numbers = f"{self._numbers(leaf.left)}, {self._numbers(leaf.right)}"
                args = f"(«call, »{self._to(leaf.then)}, {numbers})"
                function = self.need("chained_add")
                return [
                    f"return rpc.rpc_sync({self._to(leaf.to)}, {function}, args={args}).tolist()"
                ]
            case Through():
                rref, addend = f"handles[{_quoted(leaf.handle)}]", _number(leaf.addend)
                if leaf.how == "remote":
                    return [f"handles[{_quoted(leaf.out)}] = {rref}.remote().add({addend})"]
                timeout = _timed(leaf).removeprefix(", ")
                if leaf.how == "async":
                    return [f"return {rref}.rpc_async({timeout}).add({addend}).wait().tolist()"]
                return [f"return {rref}.rpc_sync({timeout}).add({addend}).tolist()"]
            case Bump():
                function = self.need("bump")
                return [
                    f"rref = handles[{_quoted(leaf.handle)}]",
                    f"return rpc.rpc_sync(rref.owner(), {function}, args=(rref,)).tolist()",
                ]
            case Nest():
                name = {"python": "remote_add", "builtin": "remote_builtin_add"}
                function = self.need(name.get(leaf.flavour, "remote_script_add"))
                numbers = f"{self._numbers(leaf.left)}, {self._numbers(leaf.right)}"
                args = f"(«call, »{self._to(leaf.to)}, {numbers})"
                made = f"rpc.rpc_sync({self._to(leaf.via)}, {function}, args={args})"
                return [f"handles[{_quoted(leaf.out)}] = {made}"]
            case Drop():
                if leaf.by == "scope":
                    return [f"handles.pop({_quoted(leaf.handle)}).owner()", "gc.collect()"]
                return [f"del handles[{_quoted(leaf.handle)}]", "gc.collect()"]
            case Context():
                return self._context(leaf)
            case Optimize():
                return self._optimize(leaf)
            case Module():
                self.need("Affine")
                return [
                    f"module = RemoteModule({_quoted(self.names[leaf.to] + '/cpu')}, Affine)",
                    f"return module.forward({self._numbers(leaf.value)}).tolist()",
                ]
            case Pause():
                return [f"time.sleep({leaf.seconds!r})"]
            case Refused():
                self.imports[_DIST_AUTOGRAD] = None
                return [
                    "try:",
                    f"    dist_autograd._retrieve_context(contexts[{_quoted(leaf.context)}])",
                    "except RuntimeError:",
                    '    return {"refused": True}',
                    'return {"refused": False}',
                ]
            case _:
                msg = f"{leaf!r} is no step of a rank"
                raise TypeError(msg)

    def _to(self, rank: int) -> str:
        return _quoted(self.names[rank])

    def _call(self, leaf: Call) -> list[str]:
        function, args = self._function(leaf)
        send = "rpc_sync" if leaf.wait == "sync" else "rpc_async"
        made = f"rpc.{send}({self._to(leaf.to)}, {function}, args={args}{_timed(leaf)})"
        if leaf.wait == "later":
            return [f"futures[{_quoted(leaf.out)}] = {made}"]
        return [f"return {made}{'.wait()' if leaf.wait == 'async' else ''}.tolist()"]

    def _context(self, leaf: Context) -> list[str]:
        self.imports[_DIST_AUTOGRAD] = None
        inside = [f"contexts[{_quoted(leaf.name)}] = context_id", "y = leaf * leaf"]
        hops: list[tuple[str, str, str]] = []
        for rank in leaf.path:
            here = self.need("breaking_hop" if rank == leaf.breaks else "hop")
            hops.append((self._to(rank), here, repr(float(rank + 2))))
        if leaf.nested and hops:
            (to, here, factor), *more = hops
            rest = ", ".join(f"({', '.join(hop)})" for hop in more)
            hops = [(to, self.need("hop_on"), f"{here}, {factor}, [{rest}]")]
        for to, function, numbers in hops:
            args = f"(«call, »{numbers}, y)"
            if leaf.rrefs:
                inside.append(f"y = rpc.remote({to}, {function}, args={args}).to_here()")
            else:
                inside.append(f"y = rpc.rpc_sync({to}, {function}, args={args})")
        inside += ["loss = y.sum()", 'result["loss"] = loss.item()']
        if leaf.backward:
            inside += self._backward(leaf)
        lines = [f"leaf = {self._numbers(leaf.value)}.requires_grad_()", "result = {}"]
        block = ["with dist_autograd.context() as context_id:", *_indented(inside)]
        if leaf.raises:
            block.append(f"    raise {self.need('Left')}")
            block = ["try:", *_indented(block), "except Left:", '    result["raised"] = True']
        return [*lines, *block, "return result"]

    @staticmethod
    def _backward(leaf: Context) -> list[str]:
        run = ["dist_autograd.backward(context_id, [loss])"]
        if leaf.retain:
            run.insert(0, "dist_autograd.backward(context_id, [loss], retain_graph=True)")
        read = 'result["gradient"] = dist_autograd.get_gradients(context_id)[leaf].tolist()'
        if leaf.breaks is None:
            return [*run, read]
        broke = ["try:", *_indented(run), "except RuntimeError:", '    result["broke"] = True']
        return [*broke, "else:", f"    {read}"]

    def _optimize(self, leaf: Optimize) -> list[str]:
        self.imports[_DIST_AUTOGRAD] = None
        self.need("PlainSGD")
        owners = ", ".join(self._to(rank) for rank in leaf.owners)
        args = f"(«call, »{self._numbers(leaf.value)})"
        if not self.labels:
            args = args.replace("))", "),)")
        return [
            "rrefs = [",
            f"    rpc.remote(owner, {self.need('make_parameter')}, args={args})",
            f"    for owner in [{owners}]",
            "]",
            "optimizer = DistributedOptimizer(PlainSGD, rrefs, lr=0.25)",
            "with dist_autograd.context() as context_id:",
            f"    contexts[{_quoted(leaf.name)}] = context_id",
            "    loss = torch.stack([rref.to_here().square().sum() for rref in rrefs]).sum()",
            "    dist_autograd.backward(context_id, [loss])",
            "    optimizer.step(context_id)",
            "return [rref.to_here().detach().tolist() for rref in rrefs]",
        ]


def _quoted(text: str) -> str:
    """`text` as Python that yields it, whatever it holds."""
    return json.dumps(text)


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _timed(leaf: Remote | Share | Fetch | Call | Through) -> str:
    return "" if leaf.timeout is None else f", timeout={leaf.timeout!r}"


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
