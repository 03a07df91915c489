// The compiled peer: net/http from Go's standard library, one goroutine that writes and syncs for
// all the requests that wait (group commit), and a 200 only after the sync.
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"os"
	"runtime"
	"syscall"
	"time"
)

var (
	publicKey  = os.Getenv("BENCH_PUBLIC")
	privateKey = []byte(os.Getenv("BENCH_PRIVATE"))
	queue      = make(chan *waiting, 1024)
)

// A line on its way to the disk, and where its handler learns how that went.
type waiting struct {
	line   []byte
	stored chan error
}

func commit(file *os.File) {
	var batch []*waiting
	var lines []byte
	for first := range queue {
		batch, lines = append(batch[:0], first), append(lines[:0], first.line...)
		runtime.Gosched() // handlers that are ready add their lines first: larger batches, fewer syncs
		for more := len(queue); more > 0; more-- {
			next := <-queue
			batch, lines = append(batch, next), append(lines, next.line...)
		}
		_, err := file.Write(lines)
		if err == nil {
			err = syscall.Fdatasync(int(file.Fd()))
		}
		for _, each := range batch {
			each.stored <- err
		}
	}
}

func authentic(body []byte, signature string) bool {
	given, err := base64.StdEncoding.DecodeString(signature)
	mac := hmac.New(sha256.New, privateKey)
	mac.Write(body)
	return err == nil && hmac.Equal(mac.Sum(nil), given)
}

func lineOf(body []byte) []byte {
	hash := sha256.Sum256(body)
	line := make([]byte, 0, len(body)+160)
	line = append(line, `{"received_at":"`...)
	line = time.Now().UTC().AppendFormat(line, "2006-01-02T15:04:05.000000Z")
	line = append(line, `","instance":"bench","id":"`...)
	line = append(line, hex.EncodeToString(hash[:16])...)
	line = append(line, `","signal":`...)
	line = append(line, body...)
	return append(line, "}\n"...)
}

// The answer's status and body.
func receive(w http.ResponseWriter, r *http.Request) (int, string) {
	if r.Method != http.MethodPost {
		return 405, `{"error":"method not allowed"}`
	}
	public, signature := r.Header.Get("x-notificare-public-key"), r.Header.Get("x-notificare-signature")
	if public == "" || signature == "" {
		return 400, `{"message":"missing parameters"}`
	}
	if public != publicKey {
		return 400, `{"error":"invalid public key"}`
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		return 400, `{"error":"body not read"}`
	}
	if !authentic(body, signature) {
		return 400, `{"error":"invalid signature"}`
	}
	if len(body) == 0 || body[0] != '{' || !json.Valid(body) {
		return 400, `{"error":"not a JSON object"}`
	}
	mine := &waiting{lineOf(body), make(chan error, 1)}
	queue <- mine
	if err := <-mine.stored; err != nil {
		return 503, `{"error":"not stored"}`
	}
	return 200, `{"message":"message received"}`
}

func main() {
	file, err := os.OpenFile(os.Getenv("BENCH_LOG"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		log.Fatal(err)
	}
	go commit(file)
	http.HandleFunc("/live", func(w http.ResponseWriter, r *http.Request) {
		status, body := receive(w, r)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		io.WriteString(w, body)
	})
	http.HandleFunc("/status", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"status":"ok"}`)
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
