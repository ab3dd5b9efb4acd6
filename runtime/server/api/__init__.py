"""The types of requests and answers, from which requests are parsed and the OpenAPI file is made."""
