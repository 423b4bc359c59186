"""Tools behind a server: VerlTool's batch API and MCP, from one registry. `core` works in process, `http` serves it."""
