// Express with the vendor's SDK, put together the way the vendor's console does it: the body as
// text, the SDK's validate(), the payload passed on to whoever looks at the page. Nothing is stored.
"use strict";

const { PassThrough } = require("stream");
const express = require("express");
const bodyParser = require("body-parser");
const { LiveApi } = require("notificare-live-api-node");

const gateway = new LiveApi(process.env.BENCH_PRIVATE, process.env.BENCH_PUBLIC).httpGateway;
const viewers = new PassThrough({ objectMode: true });
viewers.resume(); // nobody looks at the page: what is passed on is dropped, and never piles up

const app = express();
app.use(bodyParser.text({ type: "json" }));

app.post("/live", (request, response) => {
  const publicKey = request.header("x-notificare-public-key");
  const signature = request.header("x-notificare-signature");
  if (!publicKey || !signature) {
    response.status(400).send({ message: "missing parameters" });
    return;
  }
  try {
    if (!gateway.validate(publicKey, request.body, signature)) throw new Error("invalid signature");
  } catch (error) {
    response.status(400).send({ error: error.message });
    return;
  }
  viewers.write(request.body);
  response.status(200).send({ message: "message received" });
});

app.get("/status", (request, response) => response.send({ status: "ok" }));

app.listen(Number(process.argv[2]), "127.0.0.1", 2048);
