"""Imported first by the server that ranks are forked from (`stops.start_server`): it ends with the agent, and they with it."""

import os

from agentft.distributed.stops import AGENT_VARIABLE, SERVER_VARIABLE
from agentft.signals import die_with

os.environ[SERVER_VARIABLE] = str(os.getpid())
die_with(int(os.environ[AGENT_VARIABLE]))
