"""The HTTP server: pictures through an API in the form of OpenAI's, several requests drawn in one batch.

A request's way: `app` lets it in, `wire` reads it into an `Order` of pictures, `batching` queues them and
hands compatible ones to `drawing`, which owns the pipeline; `app` sends them back. `server` listens and stops.
"""
