"""``/v1/models`` in OpenAI's shape."""

from fastapi.testclient import TestClient


def test_the_list(client: TestClient) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["org/base", "student"]
    assert {model["object"] for model in body["data"]} == {"model"}


def test_a_student(client: TestClient) -> None:
    model = client.get("/v1/models/student").json()
    assert (model["kind"], model["base"], model["method"]) == ("student", "org/base", "dmd2")
    assert (model["steps"], model["max_steps"], model["default_steps"]) == ([1, 4], 4, 4)
    assert (model["size"], model["metrics"], model["owned_by"]) == ("32x32", {"kernel_distance": 0.1}, "fewstep")
    assert model["diversity"] == {
        "base_steps": 1,
        "base_guidance": 0.0,
        "skip": 1,
        "start": None,
        "until": None,
        "unprompted": 0.0,
    }


def test_a_base_whose_name_has_a_slash(client: TestClient) -> None:
    model = client.get("/v1/models/org/base").json()
    assert (model["kind"], model["steps"], model["max_steps"], model["default_guidance"]) == ("base", [], 100, 2.0)


def test_an_unknown_model(client: TestClient) -> None:
    response = client.get("/v1/models/../../etc/passwd%00")
    assert response.status_code == 404
    response = client.get("/v1/models/nobody")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"] == "no model is named 'nobody'; available: org/base, student"
