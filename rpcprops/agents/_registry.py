"""All agents, by name."""

from __future__ import annotations

from rpcprops._given import argument, shown
from rpcprops.agents._agent import Agent
from rpcprops.agents.faulty_tensorpipe import FaultyTensorPipe
from rpcprops.agents.tensorpipe import TensorPipe
from rpcprops.agents.wire.wire import Wire
from rpcprops.errors import UsageError

_agents: dict[str, Agent] = {}
#: The agent of worlds that name none.
_default = FaultyTensorPipe.name


def register(agent: Agent) -> Agent:
    """Make an agent known by its name, in this process.

    Ranks look an agent up by its name, so the code that registers it must run in them too. The
    module of a test does so, if it calls this when it is imported.

    Raises:
        UsageError: it is no agent, it has no name, or an agent of another class has its name.
    """
    given: object = agent
    if not isinstance(given, Agent) or not agent.name:
        msg = f"{argument('agent', agent)} must be an Agent with the name of its backend."
        raise UsageError(msg)
    known = _agents.get(agent.name)
    # If a module is imported again, it makes its class again.
    if known is not None and type(known).__qualname__ != type(agent).__qualname__:
        msg = (
            f"an agent {agent.name} is there already, of {type(known).__qualname__}; give the name "
            f"of another backend."
        )
        raise UsageError(msg)
    _agents[agent.name] = agent
    return agent


def named(name: str) -> Agent:
    """The agent of that name.

    Raises:
        UsageError: there is no such agent.
    """
    given: object = name
    # An agent of ours is also found in lower case, as a command line has it.
    found = _agents.get(name) or _agents.get(name.upper()) if isinstance(given, str) else None
    if found is None:
        msg = (
            f"there is no agent {shown(name)}. The agents are {', '.join(names())}, which may also "
            f"be written in lower case; rpcprops.agents.register, called in a module that ranks "
            f"import, adds another one."
        )
        raise UsageError(msg)
    return found


def names() -> tuple[str, ...]:
    """Every agent that is known in this process."""
    return tuple(sorted(_agents))


def default_name() -> str:
    """The agent of worlds that name none."""
    return _default


register(FaultyTensorPipe())
register(TensorPipe())
register(Wire())
