"""Rewards over HTTP, for clients that lack the model, the memory or the libraries: JSON and PNG, no pickles.

`app.build_app` makes the routes, `worker.Worker` scores the pictures of many clients together, and `server.serve`
runs it until it is told to stop. Needs the extra `serve` (FastAPI, uvicorn). docs/reward-service.md is the guide.
"""
