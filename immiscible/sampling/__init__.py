"""A network becomes pictures: pipelines, requests and folders of samples."""
