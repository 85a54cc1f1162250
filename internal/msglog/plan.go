package msglog

// QueuePlan collects which records of a frame go to which device queues.
type QueuePlan struct {
	index map[string]int // device -> place in order
	order []planned
	n     int // used part of order
}

type planned struct {
	name string
	recs []int
}

// Add puts record rec (its index in the slice given to Plan) into the queue of
// the device called name. Records of one device are added in rising order;
// adding the same one twice counts once.
func (q *QueuePlan) Add(name string, rec int) {
	if q.index == nil {
		q.index = make(map[string]int)
	}
	i, ok := q.index[name]
	if !ok {
		i = q.n
		q.index[name] = i
		q.n++
		if i == len(q.order) {
			q.order = append(q.order, planned{})
		}
		q.order[i].name, q.order[i].recs = name, q.order[i].recs[:0]
	}
	p := &q.order[i]
	if n := len(p.recs); n == 0 || p.recs[n-1] < rec {
		p.recs = append(p.recs, rec)
	}
}

func (q *QueuePlan) reset() {
	clear(q.index)
	q.n = 0
}

func (q *QueuePlan) entries() []planned { return q.order[:q.n] }

// drop removes the queues for which is reports true.
func (q *QueuePlan) drop(is func(name string) bool) {
	kept := 0
	for i := range q.order[:q.n] {
		if !is(q.order[i].name) {
			q.order[kept], q.order[i] = q.order[i], q.order[kept]
			kept++
		}
	}
	q.n = kept
	clear(q.index)
	for i := range q.order[:kept] {
		q.index[q.order[i].name] = i
	}
}
